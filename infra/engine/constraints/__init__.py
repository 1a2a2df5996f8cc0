"""What a text may become: grammars, and the tokens that they allow."""
