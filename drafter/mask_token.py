def choose_mask_token(tokenizer, vocab_size, explicit=None):
    return explicit or 16
