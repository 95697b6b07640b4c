"""Speed and memory beside the limit, plain Llama on a prompt that is already as short; never imported by what ships."""
