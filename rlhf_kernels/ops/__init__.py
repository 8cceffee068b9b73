"""One op a file, always in this order: formula, schema, reference, checks, fake, backward, public function."""
