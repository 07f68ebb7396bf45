"""The server behind serve.py: a model for editors, OpenAI clients and a page in the browser.

Read in this order: generation.py (a request and what comes of it), engine.py (what a model must offer), scheduler.py (many
requests, one model), batch.py (a token for each of them), prefixes.py (which row a prompt gets), answer.py (tokens to the text
of an answer), edit.py (text at a cursor), counters.py (what was done). int8_engine.py and torch_engine.py are the engines. Then
what speaks HTTP: served_model.py (a model, and how a text becomes a prompt), body.py (reads JSON strictly), options.py (reads
how to sample), replies.py (answers for the event loop), logprobs.py (tokens and their rivals), openai.py, openai_chat.py,
llamacpp.py, ollama.py (the protocols), metrics.py, safety.py and connections.py (what is refused), app.py (the paths),
server.py (the process), open_export.py (an export becomes a model to serve), open_run.py (a run does). page.html is the page.
Nothing here imports torch, except torch_engine.py and open_run.py.
"""
