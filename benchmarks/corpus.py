"""Collects text from this Python's installation and cuts it into tokens, for benchmarks.quality.

    python -m benchmarks.corpus --out /tmp/corpus

The text is the files of the standard library and of the installed packages that SUFFIXES names, in
UTF-8 and without NUL, each content once. What a file's SHA-256 says decides whether it is in and
whether it is held out, so that neither depends on names or dates. Within a part, files are sorted
by path: those of one package are neighbours. A NUL follows each.

Tokens are bytes with --vocabulary 256. A larger vocabulary is that of a byte-level byte-pair
encoder, fitted to the first of the training files (`tokenizers` is needed for it).

Writes under --out: train.npy and held_out.npy (the tokens), bytes.npy (each token's bytes),
encoder.json (the encoder, which --encoder takes instead of fitting one), paths.txt (the files of
both parts) and, last, corpus.json (sizes, checksums, packages). The same packages give the same
text, whose SHA-256 is there.
"""

import argparse
import collections
import hashlib
import importlib.metadata
import json
import pathlib
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

SUFFIXES = (".py", ".pyi", ".md", ".rst", ".txt", ".h", ".hpp", ".cuh")
# Bytes of a file: larger ones are tables, and one would be much of the held-out text.
LARGEST = 2**18
BYTES = 256  # the vocabulary whose tokens are bytes
END = "\0"  # behind each file
FITTED_TO = 32e6  # bytes of training text that an encoder is fitted to
AT_ONCE = 512  # files that are encoded in one call
PACKAGES = {"site-packages", "dist-packages"}  # inside of a folder they are read on their own
READERS = 32  # threads, as a disk that was not read before answers late


def main(argv=None):
    options = parse(argv)
    start = time.monotonic()

    def say(text):
        print(f"[{time.monotonic() - start:6.1f} s] {text}", flush=True)

    files = collect(roots())
    say(f"{len(files):,} files, {sum(map(size, files)):,} bytes")
    held_out, train = choose(files, options.held_out, options.bytes)
    say(f"{size_of(train):,} bytes of {len(train):,} files to train on")
    say(f"{size_of(held_out):,} bytes of {len(held_out):,} files held out")
    encode, lengths, name = bytes_encoder()
    folder = pathlib.Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    if options.vocabulary > BYTES:
        encoder = fitted(train, options.vocabulary, options.encoder)
        encoder.save(str(folder / "encoder.json"))
        encode, lengths, name = pairs_encoder(encoder)
        say(f"{name} of {len(lengths):,} tokens")
    facts = dict(
        python=sys.version.split()[0],
        found=dict(files=len(files), bytes=sum(map(size, files))),
        encoder=name,
        vocabulary=len(lengths),
    )
    for part, chosen in (("train", train), ("held_out", held_out)):
        ordered = sorted(chosen, key=lambda file: file.path)
        tokens = encode(file.text for file in ordered)
        np.save(folder / f"{part}.npy", tokens)
        say(f"{part}: {len(tokens):,} tokens, {size_of(chosen) / len(tokens):.3f} bytes each")
        facts[part] = described(ordered, tokens)
    np.save(folder / "bytes.npy", lengths)
    (folder / "paths.txt").write_text(paths_of(train, held_out))
    (folder / "corpus.json").write_text(json.dumps(facts, indent=1) + "\n")
    say(f"written to {folder}: SHA-256 of the training text {facts['train']['sha256']}")


def parse(argv):
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.corpus", description=__doc__.splitlines()[0]
    )
    add = made.add_argument
    add("--out", required=True, metavar="DIR")
    add("--bytes", type=float, default=150e6, help="to train on (default: %(default)g)")
    add("--held-out", type=float, default=4.5e6, help="bytes held out (default: %(default)g)")
    add("--vocabulary", type=int, default=8192, help="256 is bytes (default: %(default)s)")
    add("--encoder", metavar="FILE", help="an encoder.json of before; default: fit one")
    options = made.parse_args(argv)
    if not BYTES <= options.vocabulary <= 2**16:
        made.error(f"--vocabulary {options.vocabulary} must be {BYTES} to {2**16}")
    return options


File = collections.namedtuple("File", "path digest text")


def size(file):
    return len(file.text.encode())


def size_of(files):
    """Bytes of these files with the NUL behind each."""
    return sum(size(file) + 1 for file in files)


def roots():
    """The folders to read: the standard library and the packages, each once."""
    found = [pathlib.Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")]
    return list(dict.fromkeys(path.resolve() for path in found))


def collect(folders):
    """The files of these folders, by digest; paths are relative to a folder, so that they do not
    depend on where Python is installed. A folder inside another is read on its own."""
    found = {}
    with ThreadPoolExecutor(READERS) as pool:
        for folder in folders:
            inside = [x for x in folders if x != folder and x.is_relative_to(folder)]
            paths = [
                path
                for path in sorted(folder.rglob("*"))
                if path.suffix in SUFFIXES
                and not any(path.is_relative_to(x) for x in inside)
                and PACKAGES.isdisjoint(path.relative_to(folder).parts)
            ]
            for path, read in zip(paths, pool.map(text_and_digest, paths), strict=True):
                if read is not None:
                    text, digest = read
                    # Of copies the first path counts: folders and paths are in a fixed order.
                    name = path.relative_to(folder).as_posix()
                    found.setdefault(digest, File(name, digest, text))
    return sorted(found.values(), key=lambda file: file.digest)


def text_and_digest(path):
    """A file's text and its SHA-256; None if it is not to be kept."""
    if not path.is_file() or not 0 < path.stat().st_size <= LARGEST:
        return None
    read = path.read_bytes()
    try:
        text = read.decode()
    except UnicodeDecodeError:  # no text, or in an older encoding
        return None
    return None if END in text else (text, hashlib.sha256(read).hexdigest())


def choose(files, held_out, train):
    """Two lists: the first files until they have `held_out` bytes, the next until `train`.

    Raises:
      SystemExit: there is too little text.
    """
    parts, rest = [], iter(files)
    for wanted in (held_out, train):
        part, found = [], 0
        while found < wanted:
            file = next(rest, None)
            if file is None:
                total = size_of(files)
                raise SystemExit(
                    f"benchmarks.corpus: there are {total:,} bytes of text, --bytes and --held-out "
                    f"ask for {held_out + train:,.0f}; ask for less"
                )
            part.append(file)
            found += size(file) + 1
        parts.append(part)
    return parts


def bytes_encoder():
    """A function that maps texts to tokens, uint16 [N], each token's bytes, and a name."""

    def encode(texts):
        text = "".join(text + END for text in texts).encode()
        return np.frombuffer(text, np.uint8).astype(np.uint16)

    return encode, np.ones(BYTES, np.int32), "bytes"


def fitted(files, vocabulary, saved):
    """A byte-level byte-pair encoder, from the file `saved` or fitted to the first of these files.

    Raises:
      SystemExit: tokenizers is not installed, or the saved one has another vocabulary.
    """
    try:
        import tokenizers
    except ModuleNotFoundError:
        raise SystemExit(
            f"benchmarks.corpus: --vocabulary {vocabulary} needs the package tokenizers, which is "
            f"not installed; install it, or use --vocabulary {BYTES}"
        ) from None
    if saved:
        encoder = tokenizers.Tokenizer.from_file(saved)
        if encoder.get_vocab_size() != vocabulary:
            raise SystemExit(
                f"benchmarks.corpus: --encoder {saved} has {encoder.get_vocab_size()} tokens, "
                f"--vocabulary is {vocabulary}"
            )
        return encoder
    sample, count = [], 0
    while count < FITTED_TO and len(sample) < len(files):
        count += size(files[len(sample)])
        sample.append(files[len(sample)].text)
    encoder = tokenizers.Tokenizer(tokenizers.models.BPE())
    encoder.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    encoder.train_from_iterator(
        sample,
        tokenizers.trainers.BpeTrainer(
            vocab_size=vocabulary, initial_alphabet=sorted(alphabet), show_progress=False
        ),
    )
    return encoder


def pairs_encoder(encoder):
    """As `bytes_encoder`, of byte pairs."""
    names = sorted(encoder.get_vocab().items(), key=lambda item: item[1])
    # In a name each byte is one character, NUL is this one.
    lengths = np.array([len(name) for name, _ in names], np.int32)
    end = encoder.token_to_id("\u0100")

    def encode(texts):
        parts, texts = [], list(texts)
        for first in range(0, len(texts), AT_ONCE):
            for found in encoder.encode_batch_fast(texts[first : first + AT_ONCE]):
                parts.append(np.array([*found.ids, end], np.uint16))
        return np.concatenate(parts)

    version = importlib.metadata.version("tokenizers")
    digest = hashlib.sha256(encoder.to_str().encode()).hexdigest()
    return encode, lengths, f"byte pairs (tokenizers {version}, SHA-256 {digest})"


def described(files, tokens):
    """A part's sizes, its text's checksum, and the bytes of each package, the largest first."""
    text, packages = hashlib.sha256(), collections.Counter()
    for file in files:
        text.update((file.text + END).encode())
        packages[file.path.split("/")[0] if "/" in file.path else "modules"] += size(file)
    return dict(
        files=len(files),
        bytes=size_of(files),
        tokens=len(tokens),
        sha256=text.hexdigest(),
        packages=dict(packages.most_common(25)),
    )


def paths_of(train, held_out):
    """A line for each file: its part, its SHA-256, its path."""
    parts = (("train", train), ("held_out", held_out))
    lines = [f"{part} {file.digest} {file.path}" for part, files in parts for file in files]
    return "\n".join(sorted(lines)) + "\n"


if __name__ == "__main__":
    main()
