package paddock

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Domain is the domain of every ErrorInfo of Paddock.
const Domain = "paddock"

// Reasons of errors that no server sent.
const (
	ReasonServerUnreachable = "SERVER_UNREACHABLE"
	ReasonDeadlineExceeded  = "DEADLINE_EXCEEDED"
	ReasonCancelled         = "CANCELLED"
	ReasonNotImplemented    = "NOT_IMPLEMENTED"
	ReasonInvalidField      = "INVALID_FIELD"
	ReasonKeyInvalid        = "KEY_INVALID"
	ReasonScopeDenied       = "SCOPE_DENIED"
	ReasonInternal          = "INTERNAL"
)

var reasonOfCode = map[codes.Code]string{
	codes.Unavailable:      ReasonServerUnreachable,
	codes.DeadlineExceeded: ReasonDeadlineExceeded,
	codes.Canceled:         ReasonCancelled,
	codes.Unimplemented:    ReasonNotImplemented,
	// What gRPC itself runs out of is room in a message, and then the same call fails again.
	codes.ResourceExhausted: ReasonInvalidField,
	codes.InvalidArgument:   ReasonInvalidField,
	// HTTP 401 and 403 of a proxy come as these two.
	codes.Unauthenticated:  ReasonKeyInvalid,
	codes.PermissionDenied: ReasonScopeDenied,
}

// FieldViolation is a field of the request that is wrong.
type FieldViolation struct {
	// Field is a dotted path, for example `sampling.top_p`.
	Field string
	// Description says what is wrong and what would be right.
	Description string
}

// Error is a failed call. Get it with errors.As.
type Error struct {
	// Code is the gRPC code.
	Code codes.Code
	// Reason is the machine-readable cause, out of docs/errors.md.
	Reason string
	// Message is a sentence for a developer.
	Message string
	// Metadata has the values mentioned in Message.
	Metadata map[string]string
	// Violations names the fields that are wrong.
	Violations []FieldViolation
	// Resource is the name of what was not found.
	Resource string
	// RetryAfter is how long to wait before trying the same again; zero when that would not help.
	RetryAfter time.Duration
	// RequestID is the identifier to look for in the server's log.
	RequestID string

	status *status.Status
}

// Error returns the reason and the message.
func (e *Error) Error() string {
	return fmt.Sprintf("%s: %s", e.Reason, e.Message)
}

// GRPCStatus returns the status as it came, so that status.FromError and status.Code work.
func (e *Error) GRPCStatus() *status.Status {
	return e.status
}

// Is makes errors.Is(err, context.Canceled) and errors.Is(err, context.DeadlineExceeded) true for such calls.
func (e *Error) Is(target error) bool {
	return target == context.Canceled && e.Code == codes.Canceled ||
		target == context.DeadlineExceeded && e.Reason == ReasonDeadlineExceeded
}

// fromStatus returns the error behind a status. Without Paddock's details the code decides the reason.
func fromStatus(s *status.Status) *Error {
	decoded := &Error{Code: s.Code(), Message: s.Message(), status: s}
	for _, detail := range s.Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			if detail.GetDomain() == Domain {
				decoded.Reason = detail.GetReason()
				decoded.Metadata = detail.GetMetadata()
			}
		case *errdetails.RetryInfo:
			decoded.RetryAfter = detail.GetRetryDelay().AsDuration()
		case *errdetails.BadRequest:
			for _, violation := range detail.GetFieldViolations() {
				decoded.Violations = append(
					decoded.Violations, FieldViolation{violation.GetField(), violation.GetDescription()},
				)
			}
		case *errdetails.ResourceInfo:
			decoded.Resource = detail.GetResourceName()
		case *errdetails.RequestInfo:
			decoded.RequestID = detail.GetRequestId()
		}
	}
	if decoded.Reason == "" {
		decoded.Reason = ReasonInternal
		if reason, known := reasonOfCode[s.Code()]; known {
			decoded.Reason = reason
		}
	}
	return decoded
}

func decode(err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return err
	}
	return fromStatus(status.Convert(err))
}

// terminated returns an error for a stream that ended without its terminal message.
func terminated(seen bool, rpc, message string) error {
	if seen {
		return nil
	}
	text := fmt.Sprintf("the server ended %s without the message %s", rpc, message)
	return fromStatus(status.New(codes.Internal, text))
}

func unaryErrors(
	ctx context.Context, method string, request, response any, conn *grpc.ClientConn,
	invoke grpc.UnaryInvoker, options ...grpc.CallOption,
) error {
	return decode(invoke(ctx, method, request, response, conn, options...))
}

func streamErrors(
	ctx context.Context, description *grpc.StreamDesc, conn *grpc.ClientConn, method string,
	open grpc.Streamer, options ...grpc.CallOption,
) (grpc.ClientStream, error) {
	stream, err := open(ctx, description, conn, method, options...)
	if err != nil {
		return nil, decode(err)
	}
	return decodingStream{stream}, nil
}

type decodingStream struct{ grpc.ClientStream }

func (s decodingStream) SendMsg(message any) error { return decode(s.ClientStream.SendMsg(message)) }
func (s decodingStream) RecvMsg(message any) error { return decode(s.ClientStream.RecvMsg(message)) }
func (s decodingStream) CloseSend() error          { return decode(s.ClientStream.CloseSend()) }
