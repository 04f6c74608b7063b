"""The `idap` command: parse, call one public function, print. Nothing here is imported by the other rooms."""
