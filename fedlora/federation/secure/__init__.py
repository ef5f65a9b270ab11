"""A round of which the server learns a sum alone, as five phases of messages.

    records    what the phases say to each other
    phase      one phase: sent, awaited, read
    round      the server's side of a whole round
    client     a client's secrets and answers
    handlers   what a client does with a message of a phase

The mathematics are in `fedlora.privacy.secure`. Nothing is imported here, since a client that has
no part in this should not load a library of ciphers.
"""
