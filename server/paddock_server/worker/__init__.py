"""The process that computes, one per loaded model. It imports nothing of the server."""
