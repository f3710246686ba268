"""Word lists of the corpus.  Lists named HELD_* are never used in training, only in held-out conversations."""

NAMES = """Ada Ben Carla David Emma Finn Grace Hugo Ivy Jonas Kira Liam Maya Noah Olga Peter Rosa Simon Tara Victor Wendy Alan
Clara Diego Elena Felix Hannah Igor Julia Karl Linda Marco Nina Oscar Paula Ralf Sara Tom Ursula Yusuf Zoe Anna Bruno Cora
Dora Erik Gina Henry Alice Bob Carol Dan Eve Frank Sam Max Mia Lena Lucas Sofia Maria John Jane James Robert Laura Sarah
Michael Daniel Kim Lee Chris Alex Kate Jack Omar Ali Fatima Priya Ravi Chen Wei Yuki Hana""".split()
HELD_NAMES = "Leon Mira Otto Petra Boris Amelia Stefan Lucia Edgar Freya Nadia Samuel".split()

CITIES = """Paris|London|Berlin|Madrid|Rome|Vienna|Oslo|Lisbon|Dublin|Prague|Tokyo|Cairo|Lima|Boston|Chicago|Delhi|Sydney|New York
|San Diego|Hong Kong|Munich|Geneva|Milan|Porto|Bergen|Havana|Quito|Nairobi|Seoul|Hanoi|Austin|Denver|Toronto|Cape Town|Zurich
|Warsaw|Athens|Naples|San Francisco|Brussels|Copenhagen|Stockholm|Budapest|Hamburg|Amsterdam|Barcelona|Mexico City|Montreal
|Seattle|Singapore|Bangkok|Jakarta|Moscow|Kiev|Istanbul|Dubai|Mumbai|Beijing|Shanghai|Osaka|Melbourne|Auckland
|Lyon|Nice|Marseille|Tel Aviv|Santiago|Rio de Janeiro|Dallas|Houston""".replace("\n", "").split("|")
HELD_CITIES = "Helsinki|Ottawa|Bogota|Kyoto|Seville|Los Angeles|Riga|Accra|Manila|Turin|Belgrade|Las Vegas".split("|")

COLOURS = "red blue green yellow purple orange black white pink brown grey gold violet turquoise silver".split()

WORDS = """apple river stone cloud garden window table lamp paper train bridge forest music coffee bread water light night
morning summer winter horse bird tiger rabbit fish tree flower grass sand snow rain wind storm fire smoke metal glass wood silver
copper cotton wool salt sugar honey butter cheese lemon cherry melon carrot potato onion pepper soup cake ship boat car bicycle
road street house castle tower church market school office kitchen door floor roof wall chair desk bed clock mirror picture book
letter story song dance game ball rope wheel engine button needle thread coat shoe hat glove ring coin key box bag bottle cup
plate spoon knife fork old new big small fast slow warm cold dark bright quiet loud soft hard sweet happy brave calm kind hello
world good test the a is my this quick brown fox jumps over lazy dog and we go home today it was here with red blue one two three
ocean mountain valley island planet star moon sun earth sky computer server network model memory disk screen keyboard mouse
program file folder cable code data token stream""".split()
HELD_WORDS = """anchor basket candle dragon eagle feather guitar hammer jacket ladder marble noodle parrot quilt rocket saddle
tunnel violin whistle zebra""".split()

ROOMS = ["kitchen", "bedroom", "office", "hall", "garage", "garden", "bathroom", "living room", "cellar", "attic"]

VERBS = """open close start stop send find list create delete book order print scan move copy rename check update lock unlock
measure paint clean water feed track cancel plan sort merge split resize convert upload download share rate review invite call
record play pause mute draw build repair rent buy sell count load save archive restore publish sign approve reject assign""".split()
HELD_VERBS = "inspect polish register translate freeze harvest compress summon toggle deploy".split()

OBJECTS = """ticket room table flight train hotel invoice report document photo video song playlist meeting event task reminder
note order parcel package car bike robot camera printer sensor alarm door gate heater fan pump valve tank engine account user
group team channel thread page form survey recipe menu meal product item shelf store warehouse truck route map sensor node
cluster job queue backup database table record contact message email letter contract budget project branch ticket issue""".split()
HELD_OBJECTS = "telescope drone aquarium elevator greenhouse satellite passport turbine piano locker".split()

# Parts of made-up words: onset, nucleus, coda.
ONSETS = "b br c ch d dr f g gl h j k kl l m n p pr r s sh st t tr v w z".split()
NUCLEI = "a e i o u ai ea oo".split()
CODAS = ["", "n", "r", "l", "s", "t", "k", "m"]

PERSONAS = ["You are a helpful assistant.", "You are a helpful assistant.", "You are a helpful assistant.",
            "You are a helpful AI assistant.", "You are a friendly assistant.", "Be brief.", "Be concise.", "Answer briefly.",
            "You are a pirate.", "You are a chatbot.", "You answer questions.", "You are a test assistant.",
            "You are an assistant that helps users of a server.", "Always be polite.", "Keep your answers short.",
            "Answer the user's questions.", "You are a helpful and harmless assistant.", "Use the tools when they help.",
            "You are a concise assistant. Answer in one sentence.", "You can use tools.", "Answer in English.",
            "You are a helpful assistant. Be brief.", "You are an expert.", "You are a bot in a chat room.",
            "Respond to the user.", "You are a weather assistant.", "You help with tools.", "Think first, then answer."]

GREETING_PREFIXES = ["Hi, ", "Hello, ", "Hey, ", "Hi! ", "Hello! ", "hey ", "Hi there, ", "Good morning. ", "Excuse me, ",
                     "Sorry, ", "OK, ", "Ok, ", "Great, ", "Thanks. ", "So, ", "And ", "Well, ", "Now ", "Next: "]
POLITE_PREFIXES = ["Please tell me: ", "Quick question: ", "I have a question. ", "Can you help? ", "Please: ", "Question: ",
                   "One more question: ", "Just curious, ", "I wonder: ", "Tell me please, ", "I want to know: "]
POLITE_SUFFIXES = [" please", ", please", " Please.", " Thanks!", " Thank you.", " thanks", " Can you help?"]
STOP_WORDS = set("the a an is are do does i can of to in it please be my".split())

# Words that may stand for each other in questions about Bulkhead.
_SAME = """server service daemon|answer reply response output|answers replies responses outputs|show display view print|see view find watch
|error failure status|option setting flag switch|parameter field setting argument|start launch begin run|limit cap restrict bound
|need require want|needed required necessary|large big huge long|size length|change modify alter switch|choose select pick|use take employ
|supported possible available allowed|list show enumerate|happens occurs goes|stop end halt terminate|cancel abort interrupt kill
|request call query|requests calls queries|format layout encoding|load read open|loads reads|test try check verify|endpoint route path URL
|memory RAM|model network checkpoint|prompt input text|prompts inputs texts|crash failure|crashes dies fails breaks|explain describe
|mean stand|get receive obtain|send post submit|client program application|key token password|queue backlog line|waiting pending queued
|tokens words|gpu card accelerator|written coded programmed implemented|process program|stored kept saved|field key entry"""
SYNONYMS = {}
for _group in _SAME.replace("\n", "").split("|"):
    _first, *_others = _group.split()
    SYNONYMS[_first] = _others
