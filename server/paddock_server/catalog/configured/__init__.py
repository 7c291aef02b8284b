"""Files that say how models are served: llama-server's INI presets and `paddock.toml`. Parsing is pure."""
