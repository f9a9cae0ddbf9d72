"""Text as bytes: loading, splitting, batches, and the two byte models that any model must beat."""

import pathlib

import numpy as np

VOCABULARY = 256  # every byte is a token


def python_documentation():
    """Returns the text of Python's own documentation, as bytes; it comes with every Python.

    Some topics repeat paragraphs of others. Each paragraph is kept once, or the held-out text
    would hold sentences that the model was trained on.
    """
    from pydoc_data.topics import topics

    seen, kept = set(), []
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            if paragraph.strip() not in seen:
                seen.add(paragraph.strip())
                kept.append(paragraph)
    return "\n\n".join(kept).encode()


def load_text(paths=None):
    """Returns the files' bytes, one after the other, as uint8 [N]; without paths, Python's docs.

    Raises:
      ValueError: a file cannot be read or is empty.
    """
    if not paths:
        return np.frombuffer(python_documentation(), np.uint8)
    parts = []
    for path in paths:
        try:
            data = pathlib.Path(path).read_bytes()
        except OSError as error:
            raise ValueError(f"cannot read the text {path}: {error.strerror}") from None
        if not data:
            raise ValueError(f"the text {path} is empty")
        parts.append(data)
    return np.frombuffer(b"\n\n".join(parts), np.uint8)


def split_text(text, length, held_out=0.1):
    """Splits off the tail as held-out text: returns (train, validation).

    Raises:
      ValueError: a part is too short for one window of `length` bytes and the byte after it.
    """
    size = int(len(text) * held_out)
    if size < length + 1:
        needed = int(np.ceil((length + 1) / held_out))
        raise ValueError(
            f"the text has {len(text)} bytes; windows of {length} bytes, with {held_out:.0%} of "
            f"the text held out, need at least {needed}"
        )
    return text[:-size], text[-size:]


def batch_at(text, step, *, seed, batch, length):
    """Returns the training batch of a step, int32 [batch, length + 1]: random windows.

    It depends on the seed and the step alone, so a resumed run sees what it would have seen.
    """
    generator = np.random.default_rng((seed, step))
    starts = generator.integers(0, len(text) - length, size=batch)
    return text[starts[:, None] + np.arange(length + 1)].astype(np.int32)


def windows(text, length):
    """Cuts a text into windows int32 [n, length + 1]; each one's last byte starts the next.

    Every byte but the first is predicted once; a remainder shorter than a window is left out.
    """
    n = (len(text) - 1) // length
    return text[np.arange(n)[:, None] * length + np.arange(length + 1)].astype(np.int32)


def ngram_baselines(train, validation):
    """Fits byte models to `train`; returns their bits per byte on `validation`.

    The unigram model adds `a` to every count. The bigram model adds `s` pseudo-counts spread as
    the unigram has it: `p(y | x) = (count(x, y) + s * p(y)) / (count(x) + s)`. `a` and `s` are
    the best of a grid on the last tenth of `train`, the counts coming from the rest; then
    everything is counted again on all of `train`. `validation` decides nothing.

    Args:
      train: uint8 [N].
      validation: uint8 [M]; its first byte is only a context.

    Returns:
      A dict with "unigram" and "bigram", in bits per byte.
    """
    size = max(2, len(train) // 10)
    rest, tuning = train[:-size], train[-size:]
    grid = np.logspace(-3, 3, 25)
    a = min(grid, key=lambda a: bits_per_byte(unigram(rest, a), tuning))
    s = min(grid, key=lambda s: bits_per_byte(bigram(rest, a, s), tuning))
    return {
        "unigram": bits_per_byte(unigram(train, a), validation),
        "bigram": bits_per_byte(bigram(train, a, s), validation),
    }


def unigram(text, a):
    """Returns the add-`a` model, as a table [256, 256] whose rows are the same."""
    counts = np.bincount(text, minlength=VOCABULARY) + a
    return np.tile(counts / counts.sum(), (VOCABULARY, 1))


def bigram(text, a, s):
    """Returns p(next byte | byte), [256, 256], with `s` pseudo-counts of the unigram model."""
    counts = np.zeros((VOCABULARY, VOCABULARY))
    np.add.at(counts, (text[:-1], text[1:]), 1)
    return (counts + s * unigram(text, a)) / (counts.sum(axis=1, keepdims=True) + s)


def bits_per_byte(table, text):
    """Scores every byte of a text but the first under a table p(next byte | byte)."""
    return float(-np.log2(table[text[:-1], text[1:]]).mean())
