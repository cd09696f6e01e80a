class Journal:
    def __init__(self,p): self.p=p
    def __enter__(self): return self
    def __exit__(self,*a): pass
    def append(self,d): pass
