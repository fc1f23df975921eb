"""Questions with words that the model shall say it does not know, and the answer to them."""

from __future__ import annotations

import numpy as np

from export.default_model.asking.patterns import pick

ANSWER = "i only know shapes, colours, numbers and places"
NOUNS = {
    "train": (
        "banana", "dog", "cat", "house", "tree", "car", "boat", "flower", "apple", "man", "woman", "child", "face",
        "hand", "sun", "moon", "cloud", "bird", "fish", "horse", "chair", "table", "lamp", "book", "phone", "key",
        "bottle", "cup", "shoe", "hat", "ring", "crown", "rectangle", "hexagon", "oval", "spiral", "cube", "pyramid",
        "arrow", "letter", "line", "dot", "button", "leaf", "bus", "train", "plane", "bicycle",
    ),
    "held out": (
        "lemon", "rabbit", "bridge", "guitar", "window", "pentagon", "ellipse", "cylinder", "balloon", "spoon",
        "turtle", "mountain",
    ),
}  # fmt: skip
COLOURS = {"train": ("black", "white", "brown", "golden", "silver", "beige"), "held out": ("grey", "maroon")}
SENTENCES = {
    "train": (
        "what is the weather like?", "who painted this?", "translate hello to french.", "how old are you?", "hello",
        "tell me a joke.", "what is your name?", "who are you?", "what time is it?", "write a poem about the sea.",
        "what is the capital of france?", "how much does it cost?", "describe the picture.", "what do you see?",
        "what is in the picture?", "why is the sky blue?", "is this picture beautiful?", "do you like music?",
        "who is the president?", "when was this photo taken?", "how do i cook rice?", "can you sing?", "thank you",
        "what day is today?", "are you a robot?", "please explain quantum physics.", "good morning", "help",
        "which animal is the fastest?", "summarise the text.", "what does this mean?", "where do you live?",
    ),
    "held out": (
        "how is the weather today?", "who made you?", "translate goodbye to german.", "tell me a story.",
        "what is the meaning of life?", "how far away is the moon?", "good evening", "do you speak spanish?",
    ),
}  # fmt: skip
FRAMES = (  # with any such words
    "what is (the|my) {}?",
    "who (is|was) (|the ){}?",
    "how do i {} (the|my) {}?",
    "(please |)tell me about (|the ){}.",
    "why (is|does) the {} {}?",
    "(can|could) you {} (|the ){}?",
    "(|please ){} the {}.",
    "(|the ){} {}(| {})?",
    "{}?",
)


def babble(rng: np.random.Generator) -> str:
    """Syllables as if they were a word."""
    syllables = [pick(rng, "bcdfghjklmnprstvwz") + pick(rng, "aeiou") for _ in range(rng.integers(2, 5))]
    return "".join(syllables) + pick(rng, ("", *"dklmnrst"))
