"""Downloads from the Hugging Face Hub: the process that fetches, and what the server needs to run it.

`fetcher` is the process, with `hub` and `transfer`; only it loads huggingface_hub. `process` runs it,
`messages` is what it says, `store` what is remembered, `removal` what makes room again. Who downloads what is
decided in `paddock_server.manager.downloads`.
"""
