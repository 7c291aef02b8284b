"""`python -m paddock_server.worker.describe`: what this machine's llama.cpp is, as one line of JSON.

A process of its own, since only workers load llama.cpp, and since a build for another processor ends with a
signal. Fields: `system_info`, llama.cpp's own line about how it was built; `gpu_offload`, whether layers can
be offloaded; `devices`, each with `name`, `description`, `total_bytes` and `free_bytes`, the processor
first.
"""

from __future__ import annotations

import ctypes
import json
from typing import Any

from paddock_server.worker import llama


def _devices(library: Any) -> list[dict[str, object]]:
    """Return the devices ggml has registered. libllama's handle reaches the symbols of libggml too."""
    count, get, memory = (
        library.ggml_backend_dev_count,
        library.ggml_backend_dev_get,
        library.ggml_backend_dev_memory,
    )
    count.restype = ctypes.c_size_t
    get.argtypes, get.restype = [ctypes.c_size_t], ctypes.c_void_p
    memory.argtypes = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t), ctypes.POINTER(ctypes.c_size_t)]
    memory.restype = None
    texts = (library.ggml_backend_dev_name, library.ggml_backend_dev_description)
    for text in texts:
        text.argtypes, text.restype = [ctypes.c_void_p], ctypes.c_char_p
    devices: list[dict[str, object]] = []
    for index in range(count()):
        device = get(index)
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        memory(device, ctypes.byref(free), ctypes.byref(total))
        name, description = (text(device).decode("utf-8", "replace") for text in texts)
        devices.append(
            {
                "name": name,
                "description": description,
                "total_bytes": total.value,
                "free_bytes": free.value,
            }
        )
    return sorted(devices, key=lambda device: device["name"] != "CPU")


def main() -> None:
    """Write the line."""
    llama.init_backend()
    print(  # noqa: T201  # the one thing this program does
        json.dumps(
            {
                "system_info": llama.bindings.llama_print_system_info().decode("utf-8", "replace"),
                "gpu_offload": llama.supports_gpu_offload(),
                "devices": _devices(llama.bindings._lib),  # noqa: SLF001  # the bindings have no ggml devices
            }
        )
    )


if __name__ == "__main__":
    main()
