"""Generated from protos/paddock_server/worker/v1; see scripts/gen_protos.py. Only this file is written by hand."""
