# Read by CMake right after llama-cpp-python's own project() line (CMAKE_PROJECT_llama_cpp_INCLUDE).

# llama-cpp-python forces llama.cpp's `common` library on through the cache, and the bindings load nothing of it:
# half of the compile time for nothing. A normal variable hides the cache entry (policies CMP0077 and CMP0126).
set(LLAMA_BUILD_COMMON OFF)

# A wheel has no symbolic links, so libggml.so -> libggml.so.0 -> libggml.so.0.x would become three files, and a
# process would map the same library twice: once by the name the bindings open, once by the name libllama needs.
if(NOT APPLE)
    set(CMAKE_PLATFORM_NO_VERSIONED_SONAME ON)
endif()
