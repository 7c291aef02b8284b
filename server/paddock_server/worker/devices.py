"""`python -m paddock_server.worker.devices`: prints what ggml can compute on, as one line of JSON.

A process of its own, since the libraries start drivers and never let go of them, and since a build for
another processor ends with a signal. The object has `gpus`, each with `name`, `description`, `total_bytes`
and `free_bytes`, in the order llama.cpp offloads to them; `features`, the processor's abilities by
llama.cpp's names; `system_info`, llama.cpp's own line about how it was built; and `gpu_offload`, whether
layers can be offloaded.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
from typing import Any, Final

from paddock_server.worker.environment import set_library_environment

_TYPE_GPU: Final = 1
_TYPE_INTEGRATED_GPU: Final = 2
_FEATURE: Final = re.compile(r"(\w+) = 1\b")


def main() -> None:
    """Print the devices."""
    set_library_environment()
    from paddock_server.worker import llama

    llama.set_log_sink(lambda _level, _line: None)
    llama.init_backend()
    info = llama.bindings.llama_print_system_info().decode("utf-8", "replace")
    answer = {
        "gpus": _gpus(),
        "features": _FEATURE.findall(info),
        "system_info": info,
        "gpu_offload": llama.supports_gpu_offload(),
    }
    print(json.dumps(answer))  # noqa: T201  # the one thing this program does


def _gpus() -> list[dict[str, Any]]:
    from llama_cpp import _ggml

    library = _ggml.libggml
    functions: dict[str, tuple[Any, list[Any]]] = {
        "ggml_backend_dev_count": (ctypes.c_size_t, []),
        "ggml_backend_dev_get": (ctypes.c_void_p, [ctypes.c_size_t]),
        "ggml_backend_dev_type": (ctypes.c_int, [ctypes.c_void_p]),
        "ggml_backend_dev_name": (ctypes.c_char_p, [ctypes.c_void_p]),
        "ggml_backend_dev_description": (ctypes.c_char_p, [ctypes.c_void_p]),
        "ggml_backend_dev_memory": (None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]),
    }
    for name, (result, arguments) in functions.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    found: list[dict[str, Any]] = []
    for index in range(library.ggml_backend_dev_count()):
        device = library.ggml_backend_dev_get(index)
        if library.ggml_backend_dev_type(device) not in {_TYPE_GPU, _TYPE_INTEGRATED_GPU}:
            continue
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        library.ggml_backend_dev_memory(device, ctypes.addressof(free), ctypes.addressof(total))
        found.append(
            {
                "name": library.ggml_backend_dev_name(device).decode("utf-8", "replace"),
                "description": library.ggml_backend_dev_description(device).decode("utf-8", "replace"),
                "total_bytes": total.value,
                "free_bytes": free.value,
            }
        )
    return found


if __name__ == "__main__":
    main()
    sys.exit(0)
