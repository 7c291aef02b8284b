"""The Paddock server: loads, serves and unloads language models, one worker process per loaded model."""
