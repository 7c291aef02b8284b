// The example loads a model, showing how far it is, and lets it answer a prompt, showing the text as it comes.
//
//	go run ./example -model qwen2.5-7b-instruct-q4_k_m -prompt "Once upon a time"
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"

	paddock "github.com/paddock-serve/paddock/clients/go"
	pb "github.com/paddock-serve/paddock/clients/go/paddock/v1"
)

func main() {
	server := flag.String("server", paddock.DefaultTarget, "server to talk to")
	model := flag.String("model", "", "model to use")
	prompt := flag.String("prompt", "Once upon a time", "text to continue")
	maxTokens := flag.Int("max-tokens", 64, "most tokens to generate")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *server, *model, *prompt, int32(*maxTokens)); err != nil {
		fmt.Fprintln(os.Stderr, advice(err))
		os.Exit(1)
	}
}

func run(ctx context.Context, server, model, prompt string, maxTokens int32) error {
	client, err := paddock.Dial(server)
	if err != nil {
		return err
	}
	defer client.Close()

	loaded, err := client.LoadModel(ctx, &pb.LoadRequest{Model: model}, showProgress)
	if err != nil {
		return err
	}
	fmt.Fprintf(os.Stderr, "%s is loaded.\n", loaded.GetModel().GetId())

	request := &pb.GenerateRequest{
		Model: model,
		Input: &pb.GenerateRequest_Prompt{Prompt: prompt},
		Stop:  &pb.StopParams{MaxTokens: &maxTokens},
	}
	generated, err := client.GenerateText(ctx, request, func(delta *pb.Delta) error {
		_, err := fmt.Print(delta.GetText())
		return err
	})
	if err != nil {
		return err
	}
	fmt.Println()
	usage := generated.GetUsage()
	fmt.Fprintf(os.Stderr, "%d + %d tokens\n", usage.GetPromptTokens(), usage.GetCompletionTokens())
	return nil
}

func showProgress(event *pb.ProgressEvent) {
	stage := strings.ToLower(strings.TrimPrefix(event.GetStage().String(), "STAGE_"))
	switch detail := event.GetDetail().(type) {
	case *pb.ProgressEvent_Started:
		fmt.Fprintf(os.Stderr, "%s: %s\n", stage, detail.Started.GetMessage())
	case *pb.ProgressEvent_Advanced:
		if detail.Advanced.Fraction != nil {
			fmt.Fprintf(os.Stderr, "%s: %.0f%%\n", stage, 100*detail.Advanced.GetFraction())
		}
	case *pb.ProgressEvent_Warning:
		fmt.Fprintf(os.Stderr, "%s: %s\n", stage, detail.Warning.GetFailure().GetMessage())
	}
}

func advice(err error) string {
	var failure *paddock.Error
	if errors.As(err, &failure) && failure.Reason == paddock.ReasonServerUnreachable {
		return "No Paddock server answers. Start it with `paddock up`."
	}
	return err.Error()
}
