"""The gRPC front of the server: convert, call the manager, convert."""
