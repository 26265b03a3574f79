"""The process behind `llama_cpp_process.py`: llama.cpp's own server for one file, until the pipe to its parent closes.

A script without any import of Rung, in a process of its own because ggml ends the process at an error.
"""

from __future__ import annotations

import json
import secrets
import sys


def main() -> None:
    """Serve the model of the options in the first argument; print the address and the key."""
    import xllamacpp

    options = json.loads(sys.argv[1])
    params = xllamacpp.CommonParams()
    params.model.path = options["model"]
    params.n_ctx = options["context"]
    params.n_parallel = options["slots"]
    params.kv_unified = False  # one answer must not take the slots of another
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options["threads"]
    # what a llama.cpp for people rounds: keys and values to 16 bits, and flash attention its sums
    if options["is_exact"]:
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.n_gpu_layers = 0
    params.cache_ram_mib = options["kept_bytes"] // 2**20  # 8 GiB by default
    params.swa_full = True
    params.warmup = params.ui = params.fit_params = False
    params.offline = params.use_jinja = params.endpoint_props = True
    if options["adapter"] is not None:
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = options["adapter"], 1.0
        params.lora_adapters = [adapter]
    if options["computes_embeddings"]:
        params.embedding = True
        # an encoder reads a text at once: all tokens see each other
        params.n_batch = params.n_ubatch = options["context"] // options["slots"]
    key = secrets.token_urlsafe()
    params.api_keys = [key]
    params.verbosity = 1  # what is said of each request would fill the disk in weeks
    server = xllamacpp.Server(params)
    print(json.dumps({"url": server.listening_address, "key": key}), flush=True)
    sys.stdin.read()  # until the parent closes it, or ends


if __name__ == "__main__":
    main()
