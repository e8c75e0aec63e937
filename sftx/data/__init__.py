"""From files to examples: sources, encoding, the ledger of dropped and cut rows."""
