// Renders Go templates as Ollama does: reads a JSON list of templates with their data, writes a JSON list of texts.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct {
	Role    string
	Content string
}

type request struct {
	Template string
	System   string
	Messages []message
}

func main() {
	var requests []request
	if err := json.NewDecoder(os.Stdin).Decode(&requests); err != nil {
		panic(err)
	}
	texts := make([]string, len(requests))
	for i, request := range requests {
		var text strings.Builder
		if err := template.Must(template.New("").Parse(request.Template)).Execute(&text, request); err != nil {
			panic(err)
		}
		texts[i] = text.String()
	}
	if err := json.NewEncoder(os.Stdout).Encode(texts); err != nil {
		panic(err)
	}
}
