"""Word vectors from a text, updated row by row: skip-gram with negative samples, in NumPy.

    python examples/word2vec_rows.py

Of 5,000 words a batch touches a few hundred. ``opt.step_rows`` updates these rows alone, and costs what they cost. One
sees the share of nearest neighbours that have the topic of their word rise from 5 % (there are 20 topics) to more than
80 %. The text is made here: a sentence is about one topic, most of whose words are from that topic's list.
"""

from __future__ import annotations

import numpy as np

import fastopt

WORDS, TOPICS, DIMENSIONS = 5_000, 20, 32
SENTENCES, LENGTH, WINDOW = 4_000, 12, 2
BATCH_SIZE, NEGATIVES, EPOCHS = 512, 5, 3


def write_text(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return sentences of word numbers, (SENTENCES, LENGTH), and the topic of each word."""
    topic_of_word = rng.integers(0, TOPICS, WORDS)
    lists = [np.flatnonzero(topic_of_word == topic) for topic in range(TOPICS)]
    topics = rng.integers(0, TOPICS, SENTENCES)
    sentences = np.stack([rng.choice(lists[topic], LENGTH) for topic in topics])
    strangers = rng.random(sentences.shape) < 0.2  # every fifth word is any word
    sentences[strangers] = rng.integers(0, WORDS, strangers.sum())
    return sentences, topic_of_word


def pairs_of(sentences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each word, and one of the words at most WINDOW places from it."""
    centres, contexts = [], []
    for offset in range(1, WINDOW + 1):
        left, right = sentences[:, :-offset].ravel(), sentences[:, offset:].ravel()
        centres += [left, right]
        contexts += [right, left]
    return np.concatenate(centres), np.concatenate(contexts)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + exp(-x))."""
    return 1 / (1 + np.exp(-x))


def same_topic(vectors: np.ndarray, topic_of_word: np.ndarray) -> float:
    """Return the share of 500 words whose nearest other word, by cosine, has the same topic."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = unit[:500] @ unit.T
    cosines[np.arange(500), np.arange(500)] = -2  # a word is not its own neighbour
    return float((topic_of_word[cosines.argmax(axis=1)] == topic_of_word[:500]).mean())


def main() -> None:
    """Train, and print how many neighbours have the topic of their word."""
    rng = np.random.default_rng(0)
    sentences, topic_of_word = write_text(rng)
    centres, contexts = pairs_of(sentences)
    params = {
        "words": rng.uniform(-0.5, 0.5, (WORDS, DIMENSIONS)).astype(np.float32) / DIMENSIONS,
        "contexts": np.zeros((WORDS, DIMENSIONS), np.float32),
    }
    opt = fastopt.Adagrad(params, lr=0.2)
    print(f"start     neighbours of the same topic {same_topic(opt.params['words'], topic_of_word):.2f}")
    for epoch in range(EPOCHS):
        losses = []
        for centre, context in fastopt.minibatches(centres, contexts, batch_size=BATCH_SIZE, rng=epoch):
            # One true context for each word, and NEGATIVES words drawn at random, which it should score low.
            others = np.concatenate([context[:, None], rng.integers(0, WORDS, (len(centre), NEGATIVES))], axis=1)
            u = opt.read_rows("words", centre)  # (B, D): rows as a full step would have left them
            v = opt.read_rows("contexts", others.ravel()).reshape(*others.shape, DIMENSIONS)
            chance = sigmoid((v @ u[:, :, None])[:, :, 0])
            losses.append(-np.log(chance[:, 0]).mean() - np.log(1 - chance[:, 1:]).sum(axis=1).mean())
            error = chance / len(centre)
            error[:, 0] -= 1 / len(centre)
            du = (error[:, None, :] @ v)[:, 0]
            dv = error[:, :, None] * u[:, None, :]
            opt.step_rows(
                {
                    "words": (centre, du),  # a word that is there twice: its gradients are added up
                    "contexts": (others.ravel(), dv.reshape(-1, DIMENSIONS)),
                }
            )
        opt.flush_rows()  # before all rows are read
        share = same_topic(opt.params["words"], topic_of_word)
        print(f"epoch {epoch + 1}   neighbours of the same topic {share:.2f}   loss {np.mean(losses):.3f}")


if __name__ == "__main__":
    main()
