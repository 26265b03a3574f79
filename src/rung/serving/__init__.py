"""One run or several, and GGUF files, behind the HTTP API of OpenAI.

`app` is the web application and hands each request to the model that it names: `engine_model` for what this process
computes, `llama_cpp_model` for GGUF files. `engine` is the one thread that computes, `running` a request in it,
`answers` turns tokens into text and finish reasons, `protocol` reads requests and writes responses, `events` streams
them, `scoring` judges texts that exist, `catalog` opens the models, `gguf_facts` reads what a file needs, `run` is the
command. Who may ask is decided in `web`.
"""
