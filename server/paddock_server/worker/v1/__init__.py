"""Generated from protos/paddock_server/worker/v1 by scripts/gen_protos.py, all but this file."""
