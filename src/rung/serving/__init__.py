"""One run or several behind the HTTP API of OpenAI.

`app` is the web application, `engine` the one thread that computes, `answers` turns tokens into text and finish
reasons, `protocol` reads requests and writes responses, `scoring` judges texts that exist, `catalog` opens the models,
`run` is the command. Who may ask is decided in `web`.
"""
