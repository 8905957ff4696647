def prefix_match_lengths(correct, valid):
    return (correct & valid).long().cumprod(1).sum(1)
