"""KV transfer from prefill ranks to the decode server: `--disaggregation-transfer-backend zmq`.

    wire        frames: header, messages, checksum, bounds
    ownership   which pages of a request each prefill rank holds
    pages       the KV pool (and the aux buffers) as rows of bytes that can be gathered and scattered
    compat      what both servers must agree on, and the sentence when they do not
    assembly    one request on the decode side: what has arrived, and when it is complete
    loop        the thread that owns the sockets of a process
    sending     prefill: answers the decode servers' asks with announce, data, aux, end
    receiving   decode: asks every prefill rank, checks, writes into the pool, says done
    manager, sender, receiver, bootstrap
                SGLang's interfaces (`disaggregation/base/conn.py`) on top of the above

Only the last line imports SGLang.
"""
