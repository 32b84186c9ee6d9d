"""KV transfer from prefill ranks to the decode server: `--disaggregation-transfer-backend zmq`.

    wire        frames: header, messages, checksum, bounds
    ownership   which pages of a request each prefill rank holds
    pages       the KV pool (and the aux buffers) as rows of bytes that can be gathered and scattered
    heads       which KV heads are where, with tensor parallel sizes that differ
    compat      what both servers must agree on, and the sentence when they do not
    config, keys, hosts
                `--kv-transfer-config`; who is let in; where the sockets listen
    assembly    one request on the decode side: what has arrived, and when it is complete
    loop        the thread that owns the sockets of a process
    lives       prefill: which decode servers are alive
    outbox      one request on the prefill side: what waits to be sent, and may be read
    observer    metrics and log lines
    sending     prefill: answers the decode servers' asks with announce, data, aux, end
    fan_out     prefill: one request's transfers to several decode ranks
    receiving   decode: asks every prefill rank, checks, writes into the pool, says done
    layer_stream
                sends a prompt's layers while later ones are computed
    manager, sender, receiver, bootstrap, directory
                SGLang's interfaces (`disaggregation/base/conn.py`) on top of the above

Only the last line imports SGLang.
"""
