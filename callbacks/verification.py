from lightning.pytorch import Callback
class SpeculativeVerification(Callback):
    """x

    Args:
        max_new_tokens: y
    """
    def __init__(self, max_new_tokens: int = 64, prompts_per_set: int = 4, batch_size: int = 3, every_n_epochs: int=1): pass
