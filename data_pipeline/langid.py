"""py3langid's model, evaluated with numpy arrays; py3langid runs its automaton in Python, byte by byte.

An n-gram of the model has at most DEPTH bytes, so the automaton's state depends only on the last DEPTH bytes. With
delta the transition function and b the bytes, s_k[i] = delta(s_{k-1}[i - 1], b[i]) is the state after the last k bytes
before and including i, from the initial state, computed for all i at once; s_DEPTH is the automaton's state.
"""

import math
import unicodedata

import numpy as np

DEPTH = 6  # bytes of the longest n-gram


class Identifier:
    """The same scores as `py3langid.langid.LanguageIdentifier` with norm_probs=True.

    `moves` [rows * 256]: next state by row offset and byte; `rows` [states]: row offset of a state; `features`
    [states]: the n-gram that ends in a state, or -1; `weights` [features, classes] and `prior` [classes]: logarithms.
    """

    def __init__(self, model):
        self.moves = np.frombuffer(model.tk_nextmove, np.uint32)
        self.rows = np.array(model.tk_row, np.uint32) << 8
        self.features = np.array(model.tk_output, np.int32)
        self.weights = model.nb_ptc.astype(np.float32)
        self.prior = model.nb_pc
        self.classes = model.nb_classes
        first = self.moves[self.rows[0] + np.arange(256, dtype=np.uint32)]
        self.pairs = self.moves[self.rows[first][:, None] + np.arange(256, dtype=np.uint32)].ravel()  # after two bytes
        self.first = first
        self.gathered = np.empty((0, len(self.classes)), np.float32)
        self.aliases = [(self.classes.index(c), i) for i, c in enumerate(self.classes) if self.classes.index(c) < i]

    def classify(self, text: str) -> tuple[str | None, float]:
        """(code, probability) of the likeliest language; (None, 0) when the text has no n-gram of the model."""
        if text.isupper():
            text = text.lower()
        data = unicodedata.normalize("NFC", text).encode("utf-8", "surrogatepass")
        grams, counts = self._ngrams(np.frombuffer(data, np.uint8))
        if not len(grams):
            return None, 0.0
        scores = np.log1p(counts) @ self._weights_of(grams) + self.prior
        scores *= 1.0 / math.sqrt(len(data))
        np.exp(scores - scores.max(), out=scores)
        scores /= scores.sum()
        for one, other in self.aliases:
            scores[one] += scores[other]
            scores[other] = 0.0
        best = int(scores.argmax())
        return self.classes[best], float(scores[best])

    def _weights_of(self, grams: np.ndarray) -> np.ndarray:
        """Rows of `weights`, float32 [n, classes], in a reused buffer: page faults of a new one cost ten times the
        copy."""
        if len(self.gathered) < len(grams):
            self.gathered = np.empty((2 * len(grams), len(self.classes)), np.float32)
        return np.take(self.weights, grams, axis=0, out=self.gathered[: len(grams)], mode="clip")

    def _ngrams(self, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(Distinct n-grams of a text, int32 [n], their counts, float32 [n])."""
        found = self.features[self._states(data)]
        found = np.sort(found[found >= 0])
        starts = np.flatnonzero(np.concatenate(([True], found[1:] != found[:-1]))) if len(found) else found
        return found[starts], np.diff(np.append(starts, len(found))).astype(np.float32)

    def _states(self, data: np.ndarray) -> np.ndarray:
        """The state after each byte, uint32 [bytes]."""
        states = self.first[data[:1]]
        if len(data) < 2:
            return states
        before = self.first[data]
        states = np.concatenate((states, self.pairs[data[:-1].astype(np.uint16) * np.uint16(256) + data[1:]]))
        for _ in range(DEPTH - 2):
            # Where s_k[i] = s_{k-1}[i], s_{k+1}[i + 1] = s_k[i + 1]: only changed states are computed again.
            changed = np.flatnonzero(states[:-1] != before[:-1]) + 1
            before, states = states, states.copy()
            states[changed] = self.moves[self.rows[before[changed - 1]] + data[changed]]
        return states
