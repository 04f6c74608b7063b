"""How the code of a model follows a cut: its ints get new values; where these don't suffice, the code is rewritten."""
