package paddock

import (
	"context"
	"errors"
	"io"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"

	pb "github.com/paddock-serve/paddock/clients/go/paddock/v1"
)

// DefaultTarget is where `paddock up` listens for gRPC.
const DefaultTarget = "localhost:50051"

// Largest messages: what the server takes, and what it sends.
const (
	maxRequestBytes  = 16 << 20
	maxResponseBytes = 4 << 20
)

// Only calls without side effects are sent again, and only when the server was not there.
const serviceConfig = `{
  "methodConfig": [{
    "name": [
      {"service": "paddock.v1.ModelManager", "method": "List"},
      {"service": "paddock.v1.ModelManager", "method": "Get"},
      {"service": "paddock.v1.ModelManager", "method": "Tokenize"},
      {"service": "paddock.v1.ModelManager", "method": "Detokenize"},
      {"service": "paddock.v1.ModelManager", "method": "GetServerInfo"}
    ],
    "retryPolicy": {
      "maxAttempts": 3,
      "initialBackoff": "0.1s",
      "maxBackoff": "1s",
      "backoffMultiplier": 3,
      "retryableStatusCodes": ["UNAVAILABLE"]
    }
  }]
}`

// Client calls one server. Its methods are those of the generated stub; every error they return is an *Error, or
// io.EOF at the end of a stream. It is safe for concurrent use.
type Client struct {
	pb.ModelManagerClient
	conn *grpc.ClientConn
}

// Dial returns a client of the server at target, `host:port` or any other gRPC name. It connects on the first call.
//
// Options are applied after the client's own: no transport security, pings every 20 s so that a long silent stream
// notices a lost peer, and retries of read-only calls.
func Dial(target string, options ...grpc.DialOption) (*Client, error) {
	own := []grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{
			Time:                20 * time.Second,
			Timeout:             10 * time.Second,
			PermitWithoutStream: true,
		}),
		grpc.WithDefaultCallOptions(
			grpc.MaxCallSendMsgSize(maxRequestBytes),
			grpc.MaxCallRecvMsgSize(maxResponseBytes),
		),
		grpc.WithDefaultServiceConfig(serviceConfig),
		grpc.WithChainUnaryInterceptor(unaryErrors),
		grpc.WithChainStreamInterceptor(streamErrors),
	}
	conn, err := grpc.NewClient(target, append(own, options...)...)
	if err != nil {
		return nil, err
	}
	return &Client{ModelManagerClient: pb.NewModelManagerClient(conn), conn: conn}, nil
}

// Close closes the connection; running calls are cancelled.
func (c *Client) Close() error {
	return c.conn.Close()
}

// LoadModel loads a model and returns once it is ready. onProgress, which may be nil, is called for every event.
// Cancelling ctx detaches; the load goes on, and Unload aborts it.
func (c *Client) LoadModel(
	ctx context.Context, request *pb.LoadRequest, onProgress func(*pb.ProgressEvent),
) (*pb.Loaded, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.Load(ctx, request)
	if err != nil {
		return nil, err
	}
	var loaded *pb.Loaded
	for {
		response, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return loaded, terminated(loaded != nil, "Load", "loaded")
		}
		if err != nil {
			return nil, err
		}
		switch event := response.GetEvent().(type) {
		case *pb.LoadResponse_Progress:
			if onProgress != nil {
				onProgress(event.Progress)
			}
		case *pb.LoadResponse_Loaded:
			loaded = event.Loaded
		}
	}
}

// GenerateText generates and returns once every choice has ended. onDelta is called for every piece of text; an error
// it returns stops the generation and is returned. Cancelling ctx stops the generation.
func (c *Client) GenerateText(
	ctx context.Context, request *pb.GenerateRequest, onDelta func(*pb.Delta) error,
) (*pb.Generated, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.Generate(ctx, request)
	if err != nil {
		return nil, err
	}
	var generated *pb.Generated
	for {
		response, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return generated, terminated(generated != nil, "Generate", "generated")
		}
		if err != nil {
			return nil, err
		}
		switch event := response.GetEvent().(type) {
		case *pb.GenerateResponse_Deltas:
			for _, delta := range event.Deltas.GetDeltas() {
				if err := onDelta(delta); err != nil {
					return nil, err
				}
			}
		case *pb.GenerateResponse_Generated:
			generated = event.Generated
		}
	}
}
