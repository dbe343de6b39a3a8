"""Word list of the antonym task. Per line: a word and its opposite in English, then French, then Spanish."""

_TABLE = """\
small large petit grand pequeño grande
hot cold chaud froid caliente frío
fast slow rapide lent rápido lento
old young vieux jeune viejo joven
rich poor riche pauvre rico pobre
strong weak fort faible fuerte débil
light heavy léger lourd ligero pesado
high low haut bas alto bajo
early late tôt tard temprano tarde
wet dry mouillé sec mojado seco
clean dirty propre sale limpio sucio
full empty plein vide lleno vacío
hard soft dur mou duro blando
thick thin épais mince grueso delgado
open closed ouvert fermé abierto cerrado
good bad bon mauvais bueno malo
true false vrai faux verdadero falso
beautiful ugly beau laid hermoso feo
day night jour nuit día noche
black white noir blanc negro blanco
left right gauche droite izquierda derecha
first last premier dernier primero último
love hate amour haine amor odio
war peace guerre paix guerra paz
life death vie mort vida muerte
near far proche lointain cercano lejano
bright dark clair sombre claro oscuro
brave cowardly courageux lâche valiente cobarde
easy difficult facile difficile fácil difícil
calm nervous calme nerveux tranquilo nervioso
loud quiet bruyant silencieux ruidoso silencioso
sweet bitter sucré amer dulce amargo
friend enemy ami ennemi amigo enemigo
inside outside dedans dehors dentro fuera
deep shallow profond superficiel profundo superficial
summer winter été hiver verano invierno
always never toujours jamais siempre nunca
victory defeat victoire défaite victoria derrota
win lose gagner perdre ganar perder
buyer seller acheteur vendeur comprador vendedor
truth lie vérité mensonge verdad mentira"""

ANTONYMS = tuple(tuple(line.split()) for line in _TABLE.splitlines())
