"""Compiles plantime's step with a dump, and prints the HLO of fusions named in argv[2:]."""
import glob, os, re, subprocess, sys
env = dict(os.environ, XLA_FLAGS="--xla_dump_to=/tmp/dump", JAX_ENABLE_COMPILATION_CACHE="false")
subprocess.run([sys.executable, "/tmp/carry/plantime.py", sys.argv[1], "compileonly"], env=env)
files = [f for f in glob.glob("/tmp/dump/*gpu_after_optimizations.txt")]
big = max(files, key=os.path.getsize); text = open(big).read(); print(big, len(text))
out = open(os.environ["OUT"] + "/hlo.json", "w")
comps = {m[1]: m[0] for m in re.finditer(r"^%?([\w.\-]+) (?:\([^\n]*)?\{\n.*?^\}", text, re.M | re.S)}
for name in sys.argv[2:]:
    hlo = re.sub(r"_(\d+)$", r".\1", name)
    for line in text.splitlines():
        if re.match(rf"\s*(ROOT )?%{re.escape(hlo)} = ", line):
            out.write("=== " + line[:1500] + "\n")
            c = re.search(r"calls=%([\w.\-]+)", line)
            if c:
                m = re.search(rf"^%{re.escape(c[1])} .*?^\}}", text, re.M | re.S)
                out.write((m[0][:6000] if m else "?") + "\n")
            for o in re.findall(r"%([\w.\-]+)", line.split("(", 1)[1])[:8]:
                m = re.search(rf"^\s*%{re.escape(o)} = .*$", text, re.M); out.write("   operand " + (m[0][:500] if m else o) + "\n")
out.close()
