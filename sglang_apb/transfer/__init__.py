"""KV transfer from prefill ranks to the decode server: `--disaggregation-transfer-backend zmq`.

    wire        frames: header, messages, checksum, bounds
    ownership   which pages of a request each prefill rank holds
    pages       the KV pool (and the aux buffers) as rows of bytes that can be gathered and scattered
    room_number the number by which both servers know a request
    heads       which KV heads are where, with tensor parallel sizes that differ
    compat      what both servers must agree on, and the sentence when they do not
    config, keys, hosts
                `--kv-transfer-config`; who is let in; where the sockets listen
    loop        the thread that owns the sockets of a process
    observer    metrics and log lines

    prefill:
    sending     answers the decode ranks' asks with announce, blocks, aux, end
    outbox, blocks
                one request: what waits to be sent, and may be read; the frames that bring its pages
    rooms, early
                a rank's requests; what decode ranks said of those that are not here yet, or not any more
    decode_peers, lives
                who is connected, how pages get there, and who is alive
    fan_out     one request's transfers to several decode ranks
    layer_stream
                sends a prompt's layers while later ones are computed

    decode:
    receiving   asks every prefill rank, checks, writes into the pool, says done
    inbox, assembly
                one request: how far it has come; what has arrived, and when it is complete
    prefill_peer, ways
                a prefill rank that is connected, and how its pages get here

    data planes beside ZMQ, chosen in planes:
    direct, cuda_ipc
                pages that are read where they lie: who is given a handle on them; CUDA's handles
    exchange, fetcher, nccl, communicator
                blocks that are fetched when both sides are ready: how the sides meet; what decode asks for; slots and
                copies on GPUs, with NCCL's calls each in a worker's thread
    gpu_pages   some heads' pages in GPU memory: where they lie, and how they get into one piece

    manager, sender, receiver, bootstrap, directory
                SGLang's interfaces (`disaggregation/base/conn.py`) on top of the above
    reasons     why a request failed on another rank
    wall        an error in a transfer ends its request, not SGLang's scheduler

Only manager to directory, wall, and communicator import SGLang.
"""
