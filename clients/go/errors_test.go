package paddock_test

import (
	"context"
	"errors"
	"net"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	paddock "github.com/paddock-serve/paddock/clients/go"
	pb "github.com/paddock-serve/paddock/clients/go/paddock/v1"
)

// failing answers Get and Load with an error, and ends Generate without its terminal message.
type failing struct {
	pb.UnimplementedModelManagerServer
}

func queueFull() error {
	full, err := status.New(codes.Unavailable, "Full.").WithDetails(
		&errdetails.ErrorInfo{Reason: "QUEUE_FULL", Domain: "paddock", Metadata: map[string]string{"model": "m"}},
		&errdetails.RetryInfo{RetryDelay: durationpb.New(2 * time.Second)},
		&errdetails.BadRequest{FieldViolations: []*errdetails.BadRequest_FieldViolation{
			{Field: "model", Description: "is busy"},
		}},
		&errdetails.ResourceInfo{ResourceName: "m"},
		&errdetails.RequestInfo{RequestId: "r-1"},
	)
	if err != nil {
		return err
	}
	return full.Err()
}

func (failing) Get(context.Context, *pb.GetRequest) (*pb.GetResponse, error) { return nil, queueFull() }

func (failing) Load(*pb.LoadRequest, grpc.ServerStreamingServer[pb.LoadResponse]) error {
	return queueFull()
}

func (failing) Generate(*pb.GenerateRequest, grpc.ServerStreamingServer[pb.GenerateResponse]) error {
	return nil
}

func dial(t *testing.T) *paddock.Client {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	pb.RegisterModelManagerServer(server, failing{})
	go server.Serve(listener) //nolint:errcheck // ends with Stop
	t.Cleanup(server.Stop)
	return connect(t, listener.Addr().String())
}

func connect(t *testing.T, target string) *paddock.Client {
	t.Helper()
	client, err := paddock.Dial(target)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return client
}

func failureOf(t *testing.T, err error) *paddock.Error {
	t.Helper()
	var failure *paddock.Error
	if !errors.As(err, &failure) {
		t.Fatalf("%v is no *paddock.Error", err)
	}
	return failure
}

func TestErrorsCarryEverythingTheServerSaid(t *testing.T) {
	client := dial(t)
	_, unary := client.Get(t.Context(), &pb.GetRequest{Model: "m"})
	_, streamed := client.LoadModel(t.Context(), &pb.LoadRequest{Model: "m"}, nil)

	for _, err := range []error{unary, streamed} {
		failure := failureOf(t, err)
		if failure.Code != codes.Unavailable || failure.Reason != "QUEUE_FULL" || failure.Message != "Full." {
			t.Errorf("got %+v", failure)
		}
		if failure.RetryAfter != 2*time.Second || failure.RequestID != "r-1" || failure.Resource != "m" {
			t.Errorf("got %+v", failure)
		}
		if failure.Metadata["model"] != "m" || len(failure.Violations) != 1 || failure.Violations[0].Field != "model" {
			t.Errorf("got %+v", failure)
		}
		if status.Code(err) != codes.Unavailable {
			t.Errorf("status.Code is %v", status.Code(err))
		}
	}
}

func TestWithoutDetailsTheCodeDecidesTheReason(t *testing.T) {
	_, unimplemented := dial(t).List(t.Context(), &pb.ListRequest{})
	_, unreachable := connect(t, "127.0.0.1:1").Get(t.Context(), &pb.GetRequest{})

	if reason := failureOf(t, unimplemented).Reason; reason != paddock.ReasonNotImplemented {
		t.Errorf("got %s", reason)
	}
	if reason := failureOf(t, unreachable).Reason; reason != paddock.ReasonServerUnreachable {
		t.Errorf("got %s", reason)
	}
}

func TestACancelledCallIsContextCanceled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()

	_, err := dial(t).Get(ctx, &pb.GetRequest{})

	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestAStreamWithoutItsTerminalMessageIsAnError(t *testing.T) {
	_, err := dial(t).GenerateText(t.Context(), &pb.GenerateRequest{}, nil)

	if reason := failureOf(t, err).Reason; reason != paddock.ReasonInternal {
		t.Errorf("got %s", reason)
	}
}
