warm(1,"books",5,"0"); warm(1,"books",4,"1"); warm(2,"books",5,"0"); warm(2,"books",4,"1"); warm(1,"books",1,"0","w1-books-5"); warm(1,"books",0,"1","w1-books-4"); warm(2,"books",1,"0"); warm(2,"books",0,"1")
R="/tmp/src/runs/books/"
book("books",5,"0"); book("books",4,"1")
book("books",1,"0",f"{R}1k-plus-seed0/result.json"); book("books",0,"1",f"{R}1k-tlin-seed0/result.json")

def rate0(k,slots=5): add(f"rate-{k}","0",slots,"books-1",480,f"{SW} --sweep=configs/sweep_evidence.py:rates --out=runs/rates {EV} --point={k}")
for k in (22,24,26,25,27): rate0(k)
add("stuck","cpu",0,"-",1800,"bash /tmp/carry/stuck.sh")
