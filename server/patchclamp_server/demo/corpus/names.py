"""First names, shared by the tasks that speak of people."""

NAMES = tuple(
    "Mary John Tom Anna James Paul Sarah David Emma Peter Laura Mark Alice Robert Susan Kevin Julia Brian Karen Steven"
    " Nancy Daniel Linda George Helen Edward Grace Henry Rachel Simon Diana Oliver Sophie Thomas Victor Claire Martin"
    " Rose Andrew Kate Michael Lucy Philip Jane Adam Ruth Eric Amy Jack Ellen".split()
)
