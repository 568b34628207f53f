"""What a corpus of text holds, as tables in Markdown: the columns of the paper's Tables 1 and 2."""

from collections.abc import Sequence

from ct_audio.common.errors import UserError
from ct_audio.common.text import markdown_table
from ct_audio.data.corpus import Corpus

_COLUMNS = ("corpus", "split", "documents", "words", "words a document", "bytes", "units", "bytes a unit")


def statistics_table(corpora: Sequence[Corpus]) -> str:
    """One row a split: documents (books, articles), words, mean length in words, bytes, units of the codec.

    Words are those of `Split.num_words`: separated by white space; of a codec of words, its units.

    Raises:
        UserError: a corpus is of audio.
    """
    rows = []
    for corpus in corpora:
        names = [name for name in ("train", "valid", "test") if name in corpus.splits]
        for name in names + sorted(corpus.splits.keys() - set(names)):
            split = corpus.split(name)
            if split.num_words is None or split.num_bytes is None:
                raise UserError(f"{corpus.path} is a corpus of audio; expected one of text")
            num_documents = len(split.document_names)
            rows.append(
                (
                    corpus.path.name,
                    name,
                    f"{num_documents:,}",
                    f"{split.num_words:,}",
                    f"{split.num_words / num_documents:,.0f}",
                    f"{split.num_bytes:,}",
                    f"{split.num_codes:,}",
                    f"{split.num_bytes / split.num_codes:.3f}",
                )
            )
    return markdown_table([_COLUMNS, *rows])


def vocabulary_table(corpora: Sequence[Corpus]) -> str:
    """One row a corpus, as in the paper's Table 1: mean length in words and size of training, vocabulary, unit."""
    rows = [("corpus", "words a training document", "training MB", "vocabulary", "unit")]
    for corpus in corpora:
        train = corpus.split("train")
        if train.num_words is None or train.num_bytes is None:
            raise UserError(f"{corpus.path} is a corpus of audio; expected one of text")
        mean_words = f"{train.num_words / len(train.document_names):,.0f}"
        size = f"{train.num_bytes / 1e6:,.1f}"
        rows.append((corpus.path.name, mean_words, size, f"{corpus.codec.vocab_size:,}", corpus.codec.unit))
    return markdown_table(rows)
