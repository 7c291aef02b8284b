"""Speed and memory of Paddock beside its own engine loop with nothing around it: `python -m bench`."""
