"""How the starter model is made: corpus, dialogues, tokenizer, training, measured card."""
