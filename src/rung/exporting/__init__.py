"""Hand-over: GGUF files for llama.cpp, Ollama and vLLM folders, model cards, and the proof that they are the run."""
