"""GPTQ-packed linears, as vLLM, AutoRound and GPTQModel read them."""
