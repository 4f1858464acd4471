import re,sys,textwrap
for p in sys.argv[1:]:
    out=[];par=[];code=False
    def flush():
        global par
        if not par: return
        if max(map(len,par))>120 or '--all' in sys.argv:
            m=re.match(r'(- |\d+\. |)',par[0]); lead=m[1]; text=' '.join(x.strip() for x in par)[len(lead):]
            out.extend(textwrap.wrap(text,120,initial_indent=lead,subsequent_indent=' '*len(lead),break_long_words=False,break_on_hyphens=False))
        else: out.extend(par)
        par=[]
    for l in open(p).read().split('\n'):
        if l.startswith('```'): flush(); code=not code; out.append(l); continue
        if code or l.startswith(('|','#','!')) or not l.strip(): flush(); out.append(l); continue
        if re.match(r'(- |\d+\. )',l): flush()
        par.append(l)
    flush(); open(p,'w').write('\n'.join(out))
