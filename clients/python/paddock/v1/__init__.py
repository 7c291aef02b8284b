"""Generated from protos/paddock/v1 by scripts/gen_protos.py, all but this file."""
