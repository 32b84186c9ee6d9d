"""Prompts after InfiniteBench's for chat models (its src/prompt.py), and how long answers may be: a sentence."""

from __future__ import annotations


def _one_line(text: str) -> str:
    """The text of lines that are broken for their width alone; empty ones stay."""
    return "\n\n".join(" ".join(part.split("\n")) for part in text.strip().split("\n\n"))


_OPTIONS = "\nA. {options[0]}\nB. {options[1]}\nC. {options[2]}\nD. {options[3]}"
TEMPLATES = {
    "passkey": _one_line("""
There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you about the
important information there.

{context}

{input}"""),
    "number_string": _one_line("""
There is an important info hidden inside a lot of irrelevant text. Find it. I will quiz you about the important
information there.

{context}

{input}"""),
    "kv_retrieval": _one_line("""
Extract the value corresponding to the specified key in the JSON object below.

{context}

{input}"""),
    "math_find": "{input}\n\n{context}\n\n{input}",
    "code_run": _one_line("""
Following is a set of Python functions. There is a function called named {name}.

{context}

Please give me the exact number of the return value of {call}. Be concise. Your response must end with the final
returned value."""),
    "longbook_qa_eng": _one_line("""
Read the book below and answer a question.

{context}

Question: {input}

Be very concise."""),
    "longbook_choice_eng": _one_line("""
Read the book and answer the question.

{context}

Question: {input}

Only one of the following options is correct, tell me the answer using one single letter (A, B, C, or D). Don't say
anything else.""")
    + _OPTIONS,
    "longdialogue_qa_eng": _one_line("""
Below is a dialogue script where one random occurrence of a character name is replaced with "$$MASK$$", and you should
try to guess who that character is.

The dialogue:

---

{context}

---

End of dialogue.

Which character is most likely "$$MASK$$"? Just say the name used by the scriptwriter (before the colon marks) of one
single character and nothing else."""),
    "code_debug": _one_line("""
There is ONLY ONE function in the large project that is deliberately made to include an obvious error. Please find the
function that contains the most obvious errors. I will give you four options to narrow your scope.

{context}

Which function has the deliberate error?""")
    + _OPTIONS
    + "\n\nGive me the letter of your answer only.",
}
_ANSWER_TOKENS = {"passkey": 24, "number_string": 32, "kv_retrieval": 64, "math_find": 24, "code_run": 64}


def answer_tokens(task: str) -> int:
    return _ANSWER_TOKENS.get(task, 40)
