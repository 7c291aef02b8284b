"""One loaded model: the process that computes. Imports only its own files, generated code, llama_cpp and jinja2."""
