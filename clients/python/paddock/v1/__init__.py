"""Generated from protos/paddock/v1; see scripts/gen_protos.py. Only this file is written by hand."""
