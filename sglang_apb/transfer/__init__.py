"""KV transfer from prefill ranks to decode ranks: `--disaggregation-transfer-backend zmq`. Read docs/transfer.md first.

    protocol/    what both sides say to each other, and must agree on
        wire         frames: header, messages, checksum, bounds
        compat       model, dtype and sizes of two servers, and the sentence when they do not fit
        ownership    ranges of pages: which prefill rank has which of a request
        room_number  the number by which both servers know a request
        config, keys, hosts
                     `--kv-transfer-config`; who is let in; where sockets listen
    prefill/     a prefill rank
        endpoint     its socket: takes decode ranks' asks, and has their pages sent
        transfer     one request's KV to one decode rank; `request`: to all that ask
        transfers, notices
                     those of a rank; what decode ranks have said of requests that are not here yet, or not any more
        outgoing, peers
                     what waits to be sent; who is connected
        layer_stream sends a prompt's layers while later ones are computed
    decode/      a decode rank
        endpoint     its sockets: asks prefill ranks, and takes what they send
        request      one request: what has come, and when it is over; `assembly` counts its bytes
        peer         a prefill rank that is connected
    planes/      how pages move
        base         what a data plane is; `table`: which there are; `choice`, `pair`: which is used
        zmq, cuda_ipc/, nccl/, file
                     the planes. `file` is the example to read
    memory/      pages of a pool: in host memory, on a GPU, by KV heads
    sglang/      what SGLang calls: manager, sender, receiver, bootstrap server and the directory that asks it

    loop         the thread that owns an endpoint's sockets; `heartbeats`: who is alive
    worker       a thread that does one thing after another
    observer     metrics and log lines

`planes` knows requests of both sides; endpoints know planes by `base` alone. Only `sglang/`, and NCCL's calls, import
SGLang.
"""
