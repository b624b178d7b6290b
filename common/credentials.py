"""Masking credentials in texts that are kept: a command line, a patch of uncommitted changes."""

import re

MASK = "***"

# what a variable or option that holds a credential is called; most tokens of a language model are none
_OF_TOKENS = r"(?:auth|access|hub|hf|api|git(?:hub|lab)?|bearer|refresh|session|user|private|personal|deploy|ci|wandb)"
_NAME = (
    r"(?:[\w.-]{0,60}(?:password|passwd|secret|credential|api[_-]?key|access[_-]?key|private[_-]?key)s?"
    rf"|(?:[\w.-]{{0,60}}{_OF_TOKENS}[_-])?token)"
)
# not a credential though its name sounds like one: a number, a constant, a path or an expression
_PLAIN = r"(?:\d+\b|none\b|null\b|true\b|false\b|self\b)"
_PATTERNS = (
    # https://user:password@host, https://token@host
    re.compile(r"(?P<keep>\b[a-z][a-z0-9+.-]{0,20}://)[^\s/@'\"]+(?=@)", re.IGNORECASE),
    # tokens that say what they are: Hugging Face, GitHub, GitLab, OpenAI and its kin, Slack, AWS, Google
    re.compile(
        r"(?P<keep>)\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
        r"|sk-[\w-]{16,}|xox[abprs]-[\w-]{10,}|A[KS]IA[A-Z0-9]{16}|AIza[\w-]{30,})"
    ),
    # Authorization: Bearer …
    re.compile(r"(?P<keep>\b(?:bearer|basic)\s+)[A-Za-z0-9+/._~=-]{12,}", re.IGNORECASE),
    # password = "…", "api_key": "…", --token=…, WANDB_API_KEY=…
    re.compile(rf"(?P<keep>(?<![\w-]){_NAME}[\"']?\s*[:=]\s*[\"'])[^\"'\n]+(?=[\"'])", re.IGNORECASE),
    re.compile(
        rf"(?P<keep>(?:(?<![\w-])|(?<=--)){_NAME}[=:][ \t]?)(?!{_PLAIN})[\w+/.~=-]{{12,}}(?![\w(.\[])", re.IGNORECASE
    ),
    re.compile(rf"(?P<keep>--{_NAME}\s+[\"']?)(?!-)[^\s\"']+", re.IGNORECASE),
    # a key's own lines, with a patch's sign before them
    re.compile(r"(?P<keep>-----BEGIN [A-Z ]*PRIVATE KEY-----\n)(?:[+\- ]?[A-Za-z0-9+/=]+\n)+"),
)


def mask_credentials(text: str) -> str:
    """The text with `***` in the place of what looks like a password, token or key.

    What looks like none stays: a name without a value, code that computes one. No mask can know every kind.
    """
    for pattern in _PATTERNS:
        text = pattern.sub(rf"\g<keep>{MASK}", text)
    return text
