"""Where checkpoints come from: names, folders, the Hugging Face hub. No torch, no weights in memory."""
